"""Adapters to engines that run jobs: Ray and Spark. Each needs its extra."""
