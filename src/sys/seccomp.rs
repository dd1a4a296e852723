//! placeholder until merge
use rustix::io::Errno;
pub fn install(_program: &[libc::sock_filter]) -> Result<(), Errno> {
    Ok(())
}
pub fn probe() -> Result<(), Errno> {
    Err(Errno::NOSYS)
}
