"""The service on RunPod."""
