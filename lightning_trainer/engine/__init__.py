"""From a configuration to a run; importing this loads nothing."""
