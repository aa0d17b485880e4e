"""runtime: what every program needs and no paper has: files, the device, several processes, noise."""
