use super::say::Line;
pub fn run(_line: &mut Line, _words: &[&str]) {}
