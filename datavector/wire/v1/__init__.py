"""Generated from proto/datavector/v1; do not edit."""
