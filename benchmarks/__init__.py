"""What Dagrelay costs, measured beside what one would do without it: `make bench NAME=latency`."""
