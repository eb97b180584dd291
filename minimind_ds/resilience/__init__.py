"""What keeps a run alive or ends it with a reason: signals, watchdog, stragglers, restarts, preflight."""
