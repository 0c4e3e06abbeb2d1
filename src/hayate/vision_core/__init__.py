"""Images to structured answers: profiles say what is asked, `core.VisionCore` asks it."""
