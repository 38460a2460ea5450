"""Beyond one process: training in several, a catalogue on engines, replicas, an index split over processes."""
