"""The scripts without token superposition."""
