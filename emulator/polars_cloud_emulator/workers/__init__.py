"""Worker processes, and the code that runs in them."""
