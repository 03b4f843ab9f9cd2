"""What all rooms need of the machine: whole files, memory limits, progress."""
