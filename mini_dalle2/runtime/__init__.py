"""runtime: what every program needs and no paper has: files, device, processes, noise, commands.
"""
