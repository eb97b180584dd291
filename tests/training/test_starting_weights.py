"""What a run takes over from the weights it starts with: their tokenizer, and rows for new ids where asked."""

import pytest
import torch

from minimind_ds import ModelConfig, load_tokenizer
from minimind_ds.config.run import parse_run_config
from minimind_ds.convert import export, weight_files
from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.distributed.world import World
from minimind_ds.paths import ASSETS
from minimind_ds.training import resume, starting_weights
from minimind_ds.training.prepare import prepare
from tests.convert.test_vocabulary import SIZES, add_token, changed, folder, tok, weights  # noqa: F401

EMBEDDED = ["--tokenizer", ASSETS / "tokenizer.model"]


@pytest.fixture(scope="module")
def weights_of(tok, folder, tmp_path_factory):  # noqa: F811
    """Paths to the same weights as a run, a moved file, an exported folder, a .pth; and to tokenizers."""
    out = tmp_path_factory.mktemp("start")
    config = ModelConfig(**SIZES, vocab_size=tok.vocab_size)
    for name in ("run", "moved"):
        (out / name).mkdir()
        weight_files.save_safetensors(out / name / "sft_16.safetensors", weights(config), config,
                                      Vocabulary.of(tok).to_json())
    tok.save(out / "run" / "tokenizer")
    export.export_hf(weights(config), config, tok, out / "hf", dtype=torch.float32)
    export.export_minimind(weights(config), config, out / "pth" / "full_sft_16.pth", dtype=torch.float32)
    changed(folder, out / "more", add_token)
    return {"run": out / "run", "moved": out / "moved", "hf": out / "hf", "pth": out / "pth" / "full_sft_16.pth",
            "more": out / "more", "same": folder, "file": out / "run" / "sft_16.safetensors"}


def prepared(weights_of, tmp_path, weight, *words):
    """The run, tokenizer and model of flags that begin with these weights, and what is said of it; names are paths."""
    yaml = tmp_path / "run.yaml"
    sizes = "\n".join(f"  {name}: {value}" for name, value in SIZES.items())
    yaml.write_text(f"preset: debug\nmodel:\n{sizes}\n")
    words = [str(weights_of.get(word, word)) for word in words]
    run = parse_run_config(["--config", str(yaml), "--from_weight", str(weights_of[weight]), *words], "sft", {})
    return starting_weights.tokenizer_and_model(run)


@pytest.mark.parametrize("weight", ["run", "file", "hf"])
def test_the_weights_own_tokenizer_is_taken_where_none_is_named(weight, weights_of, tmp_path):
    run, tokenizer, config, [note] = prepared(weights_of, tmp_path, weight)
    assert tokenizer.vocab_size == config.vocab_size == 330 and run.tokenizer == tokenizer.name.removesuffix(
        "/tokenizer.model")
    assert tokenizer.name in note and "was trained" in note
    assert len(starting_weights.load(run, config)["model.embed_tokens.weight"]) == 330


@pytest.mark.parametrize("weight", ["run", "hf"])
def test_a_run_that_names_no_model_has_the_weights_own(weight, weights_of, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}]}')
    flags = ["--deepspeed", "zero1", "--from_weight", str(weights_of[weight]), "--save_dir", str(tmp_path / "out"),
             "--cache_dir", str(tmp_path), "--data_path", str(data)]
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    found = prepare("sft", flags, alone)
    weight_files.check_same_model(weights_of[weight], ModelConfig(**SIZES, vocab_size=330), found.model_config)
    assert f"the model is that of {weights_of[weight]}; --preset names another" in found.notes
    with pytest.raises(ValueError, match="hidden_size is 16 there and 256 here"):
        prepare("sft", [*flags, "--preset", "debug"], alone)


@pytest.mark.parametrize("longest", [64, 32768])
def test_weights_say_how_long_their_texts_may_be(longest, tmp_path):
    config = ModelConfig(**SIZES, vocab_size=330, max_position_embeddings=longest)
    weight_files.save_safetensors(tmp_path / "own.safetensors", weights(config), config)
    run = parse_run_config(["--from_weight", str(tmp_path / "own.safetensors")], "sft", {})
    run, _ = starting_weights.own_model(*starting_weights.open_weights(run)[:2], "")
    assert run.model_config(330).to_dict() == config.to_dict()


@pytest.mark.parametrize("weight", ["run", "moved", "hf"])
def test_the_same_tokenizer_in_another_form_is_taken_without_a_word(weight, weights_of, tmp_path):
    for named in ("same", weights_of["run"] / "tokenizer"):
        _, tokenizer, _, notes = prepared(weights_of, tmp_path, weight, "--tokenizer", named)
        assert tokenizer.vocab_size == 330 and not notes


@pytest.mark.parametrize("weight, named", [("moved", []), ("run", EMBEDDED), ("hf", EMBEDDED)])
def test_another_tokenizer_is_refused_unless_allowed(weight, named, weights_of, tmp_path):
    with pytest.raises(ValueError, match="its ids stand for other text.*--tokenizer_mismatch allow") as error:
        prepared(weights_of, tmp_path, weight, *named)
    assert "\n" not in str(error.value) and str(weights_of[weight]) in str(error.value)
    run, tokenizer, config, notes = prepared(weights_of, tmp_path, weight, *named, "--tokenizer_mismatch", "allow",
                                             "--grow_vocab")
    assert tokenizer.vocab_size == config.vocab_size == 6400
    assert any("its ids stand for other text" in note for note in notes) and any("6,070 rows are added" in note
                                                                                 for note in notes)


def test_weights_that_say_nothing_get_the_tokenizer_assumed_by_name(weights_of, tmp_path):
    _, tokenizer, _, [note] = prepared(weights_of, tmp_path, "pth", "--tokenizer", "same")
    assert tokenizer.vocab_size == 330 and tokenizer.name in note and "does not say" in note
    with pytest.raises(ValueError, match="rows for 330 ids and embedded has 6,400: --grow_vocab"):
        prepared(weights_of, tmp_path, "pth")
    # What lies beside a .pth is a guess: nothing is refused for it.
    (tmp_path / "full_sft_16.pth").write_bytes(weights_of["pth"].read_bytes())
    load_tokenizer(weights_of["more"]).save(tmp_path / "tokenizer")
    beside = {**weights_of, "pth": tmp_path / "full_sft_16.pth"}
    assert prepared(beside, tmp_path, "pth", "--tokenizer", "same")[1].vocab_size == 330
    with pytest.raises(ValueError, match="rows for 330 ids and .*tokenizer has 331: --grow_vocab"):
        prepared(beside, tmp_path, "pth")
    assert prepared(beside, tmp_path, "pth", "--grow_vocab")[2].vocab_size == 331


def test_a_tokenizer_with_more_ids_needs_rows_and_gets_them_when_asked(weights_of, tmp_path):
    with pytest.raises(ValueError, match="rows for 330 ids and .* has 331: --grow_vocab adds"):
        prepared(weights_of, tmp_path, "run", "--tokenizer", "more")
    for asked, rows in (((), 331), ((64,), 384)):
        run, tokenizer, config, notes = prepared(weights_of, tmp_path, "run", "--tokenizer", "more", "--grow_vocab",
                                                 *map(str, asked))
        assert (tokenizer.vocab_size, config.vocab_size) == (331, rows)
        assert "1 more" in notes[0] and f"{rows - 330} rows are added" in notes[1]
        state = starting_weights.load(run, config)
        assert len(state["model.embed_tokens.weight"]) == rows
    # Weights that were grown go on as they are, whichever of the two tokenizers reads the data.
    (tmp_path / "grown").mkdir()
    weight_files.save_safetensors(tmp_path / "grown" / "sft_16.safetensors", state, config,
                                  Vocabulary.of(tokenizer).to_json())
    tokenizer.save(tmp_path / "grown" / "tokenizer")
    run, _, config, notes = prepared({**weights_of, "grown": tmp_path / "grown"}, tmp_path, "grown")
    assert config.vocab_size == 384 and any("rows for 384 ids" in note for note in notes)
    assert torch.equal(starting_weights.load(run, config)["model.embed_tokens.weight"],
                       state["model.embed_tokens.weight"])
    assert "adds nothing" in prepared({"grown": tmp_path / "grown"}, tmp_path, "grown", "--grow_vocab", "64")[3][1]


def test_a_checkpoint_of_another_tokenizer_is_not_gone_on_from(tok, folder):  # noqa: F811
    resume.refuse_changes({"tokenizer": tok.fingerprint}, {"tokenizer": tok.fingerprint}, "step_1")
    with pytest.raises(ValueError, match="step_1: its tokenizer is another one; name it with --tokenizer"):
        resume.refuse_changes({"tokenizer": tok.fingerprint}, {"tokenizer": load_tokenizer().fingerprint}, "step_1")


@pytest.mark.parametrize("words, why", [
    (["--grow_vocab", "--from_weight", "none"], "--grow_vocab is 1: rows are added to the weights of --from_weight"),
    (["--grow_vocab", "8", "--from_weight", "w", "--lora_rank", "4"], "--grow_vocab is 8: .*--lora_rank keeps"),
    (["--grow_vocab", "5000", "--from_weight", "w"], "at most 4096"),
    (["--grow_vocab", "-1", "--from_weight", "w"], "at least 0")])
def test_rows_that_cannot_be_added_are_refused(words, why):
    with pytest.raises(ValueError, match=why):
        starting_weights.tokenizer_and_model(parse_run_config(words, "sft", {}))
