"""Memory, traffic and a recommendation before a run, and the same counted in a step."""
