"""How fast a server answers under load: any that speaks the OpenAI routes."""
