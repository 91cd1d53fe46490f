"""How a run is started on many devices: commands of launchers, and manifests for Kubernetes. Nothing here starts it."""
