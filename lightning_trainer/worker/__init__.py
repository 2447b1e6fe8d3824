"""The preview worker: a second copy of the model that takes weights from a trainer and answers prompts with them."""
