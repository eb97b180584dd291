"""What a run is: model, flags and YAML, the DeepSpeed JSON; nothing here starts or loads anything."""
