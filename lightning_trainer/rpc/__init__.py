"""The wire between trainer and preview worker: one contract, `preview.proto`, and what both sides make of it."""
