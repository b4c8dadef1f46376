"""What people and schedules start: the command line, the run file, the Prefect flows."""
