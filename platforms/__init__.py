"""Implement `hal.protocol.Platform` for CUDA, ROCm, XPU and CPU, and hold the tables of devices.

Nothing is imported here: `hal.runtime` loads a platform when something asks for it, so that
importing this package opens no library and touches neither torch nor a driver.
"""
