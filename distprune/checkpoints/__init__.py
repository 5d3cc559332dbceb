"""The state of a run on disk: written aside, checked, and found again at any world size and ZeRO stage."""
