"""Memory, traffic, time and a recommendation before a run, and the same counted in a step."""
