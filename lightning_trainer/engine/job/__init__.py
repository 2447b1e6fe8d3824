"""A job as Python and JSON know it: `TrainerConfig`, and its lowering to the one configuration that runs."""
