use super::Result;
use super::job::Outcome;
use super::kernel::Kernel;
use super::workshop::Workshop;
pub struct It {
    pub name: &'static str,
    pub always: bool,
}
pub const VARIANTS: &[It] = &[];
pub fn run(_: &Workshop, _: &Kernel, _: &It) -> Result<Outcome> {
    Err(String::new())
}
