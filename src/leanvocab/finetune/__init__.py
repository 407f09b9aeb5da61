"""The main job: a model and data become a fine-tuned model; nothing bad is saved as its result."""
