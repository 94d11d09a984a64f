"""What the stages share, and what runs beside vLLM: plain Python that never imports flytekit or a stage."""
