#!/usr/bin/env bash
# Several machines without SLURM, by DeepSpeed's launcher over ssh:
#   bash launch/multi_node.sh HOSTFILE sft --deepspeed ds_configs/zero1.json --save_dir /shared/runs/sft [any flag]
# HOSTFILE has a line for each machine, `name slots=GPUS`, the first one first.  The checkout, its environment, the data
# and --save_dir must stand under the same paths on all of them.  --preflight, or PREFLIGHT=1, checks all machines
# first; MASTER_PORT (default 29500) is for a second run on the same machines.
case ${1:-} in -h | --help) sed -n '2,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
# ssh and pdsh read options, users, ports and lists out of names.
is_machine() { local LC_ALL=C; [[ $1 =~ ^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$ ]]; }
is_plain() { local LC_ALL=C; [[ $1 =~ ^[A-Za-z0-9_./@+,:=-]*$ ]]; }

[ $# -ge 2 ] || fail "usage: bash launch/multi_node.sh HOSTFILE sft|pretrain|benchmark [FLAG...]"
hostfile=$1 program=$2 flags=()
for word in "${@:3}"; do
    if [ "$word" = --preflight ]; then PREFLIGHT=1; else flags+=("$word"); fi
done
set -- "${flags[@]}"
if [ ! -f "$hostfile" ] || [ ! -r "$hostfile" ]; then
    fail "cannot read the host file $hostfile (lines 'name slots=GPUS')"
fi
case $program in sft | pretrain | benchmark) ;; *) fail "no program $program: name sft, pretrain or benchmark" ;; esac
[[ ${MASTER_PORT:-29500} =~ ^[1-9][0-9]{0,4}$ ]] || fail "MASTER_PORT=$MASTER_PORT is no port: 1 to 65535"
if [ -e "$home/.venv/bin/deepspeed" ]; then export PATH="$home/.venv/bin:$PATH"; fi
command -v deepspeed >/dev/null || fail "no deepspeed on PATH: bash launch/quickstart.sh installs it into .venv"

no_way_to() { # HOST, ssh's last line
    case $2 in
    *resolve* | *"timed out"* | *"No route"* | *refused* | *unreachable*)
        fail "cannot reach $1 ($2): is its name in $hostfile right, and does it run sshd?" ;;
    esac
    fail "ssh $1 asks for a password or fails ($2): ssh-copy-id $1, and accept its key once"
}

number=0 hosts=()
while read -r host slots rest || [ -n "$host" ]; do
    number=$((number + 1)) line="$host $slots $rest"
    case $host in '' | '#'*) continue ;; esac
    case $slots$rest in *$'\r') fail "$hostfile has Windows line ends: sed -i 's/\\r\$//' $hostfile" ;; esac
    [[ $slots =~ ^slots=[1-9][0-9]{0,3}$ && $rest =~ ^(#.*)?$ ]] ||
        fail "$hostfile line $number: $(printf %q "${line:0:100}") is not 'name slots=GPUS'"
    is_machine "$host" ||
        fail "$hostfile line $number: $(printf %q "${host:0:100}") is no machine's name (letters, digits, . - _); a user or a" \
            "port belongs into ~/.ssh/config"
    case " ${hosts[*]} " in *" $host "*) fail "$hostfile line $number names ${host:0:100} a second time" ;; esac
    hosts+=("$host")
done < <(tr -d '\0' <"$hostfile")
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no machine"

# DeepSpeed's launcher hands these to the other machines' shells as they are.
python=$(sed -n '1s/^#!\([^ ]*\).*/\1/p' "$(command -v deepspeed)")
for path in "$home" "$PWD" "${python:-/}"; do
    is_plain "$path" ||
        fail "$(printf %q "$path"): DeepSpeed's launcher takes no blanks, quotes or signs of the shell in the names of" \
            "its folders"
done
for command in ssh pdsh; do
    command -v $command >/dev/null ||
        fail "no $command: DeepSpeed's launcher needs it (Debian: apt-get install openssh-client pdsh)"
done
printf 'checking %s machines over ssh …\n' ${#hosts[@]}
# DeepSpeed's launcher starts its own interpreter on all machines, in this folder.
needed=("$home/launch/$program.py" "$PWD" "${python:-/}")
for host in "${hosts[@]}"; do
    # -n: ssh must not read what is not for it.
    answer=$(ssh -n -o BatchMode=yes -o ConnectTimeout=10 -- "$host" \
        "for file in$(printf ' %q' "${needed[@]}"); do test -e \"\$file\" || echo \"missing: \$file\"; done" 2>&1) ||
        no_way_to "$host" "${answer##*$'\n'}"
    # Only these lines: machines greet.
    missing=$(sed -n 's/^missing: //p' <<<"$answer")
    [ -z "$missing" ] || fail "$host has no ${missing//$'\n'/, no }: all machines need it at the same place"
done

# It joins the flags with blanks for the other machines' shells, and puts one with a blank into double quotes.
words=()
for word; do
    if [[ $word = *' '* ]]; then
        word=${word//\\/\\\\}
        word=${word//\$/\\\$}
        words+=("${word//\`/\\\`}")
    else
        words+=("$(printf %q "$word")")
    fi
done
# --force_multi: DeepSpeed would run a file of one machine on this one, whatever its name.
run=(deepspeed --force_multi --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if [ "${PREFLIGHT:-0}" = 1 ]; then
    "${run[@]}" "$home/launch/preflight.py" "${words[@]}" || fail "the pre-flight check failed; nothing was started"
fi
printf "starting DeepSpeed's launcher …\n"
exec "${run[@]}" "$home/launch/$program.py" "${words[@]}"
