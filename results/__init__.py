"""What was measured, and the page that is made of it."""
