"""The embedded end-to-end demo. `story` is read first; nothing is imported until it is asked for."""
