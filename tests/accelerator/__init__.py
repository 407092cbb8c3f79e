"""An accelerator that is emulated on the CPU: what is on the wrong device there fails here."""
