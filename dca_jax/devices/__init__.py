"""Devices: the mesh, several processes as one run, memory, preemption."""
