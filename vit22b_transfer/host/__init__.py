"""What all packages need of the machine: whole files, memory limits, progress."""
