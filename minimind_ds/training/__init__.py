"""A run, prepared and live: prepare, step, loop, metrics, spikes."""
