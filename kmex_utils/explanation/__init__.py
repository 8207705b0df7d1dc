"""A frozen network explained: prototypes from its images, and views of what they say."""
