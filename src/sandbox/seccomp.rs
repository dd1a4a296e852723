//! placeholder until merge
pub struct Filter(pub Vec<libc::sock_filter>);
impl std::ops::Deref for Filter {
    type Target = [libc::sock_filter];
    fn deref(&self) -> &[libc::sock_filter] {
        &self.0
    }
}
