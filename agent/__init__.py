"""A hospital: fine-tunes on its own images, sends its data vector, serves tasks."""
