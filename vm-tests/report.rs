use super::Result;
use super::job::Outcome;
use super::workshop::Workshop;
use std::path::Path;
pub fn write(_: &Path, _: &Workshop, _: &[Outcome]) -> Result<()> {
    Ok(())
}
