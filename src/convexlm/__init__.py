"""convexlm: fine-tune language models for the best answer instead of every answer."""
