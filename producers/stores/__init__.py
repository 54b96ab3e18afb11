"""What callers and workers both read and write in Redis. Every write of more than one key is one script."""
