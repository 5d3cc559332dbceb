"""The frozen dense teacher: run beside the student, or its outputs read from a cache."""
