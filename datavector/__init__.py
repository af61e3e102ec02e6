"""DataVector: one-shot, asynchronous merging of fine-tuned classifiers across hospitals."""
