"""What every room shares and none should write twice."""
