"""The probe programs, their header, and the stand-in for kernel headers (data, not code)."""
