"""What is believed of a kernel, and why: descriptors, the canary that proves them, verdicts kept on disk, circuit breaking, policy."""
