"""Does a run fit, how fast is it, which knob helps; and how fast these devices are."""
