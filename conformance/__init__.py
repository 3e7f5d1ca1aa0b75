"""The conformance suite: faults planted in the real code, and checks that catch each one."""
