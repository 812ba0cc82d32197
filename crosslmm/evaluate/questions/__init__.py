"""Questions of benchmarks and manifests: what they are, how their folders are read, how answers are extracted."""
