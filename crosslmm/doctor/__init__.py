"""Preflight: can every node of this cluster do what a run will ask of it. jobs/doctor.py prints it all."""
