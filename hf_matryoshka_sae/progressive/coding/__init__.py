"""What a progressive code costs: its quantiser, and rate against distortion beside a linear code."""
