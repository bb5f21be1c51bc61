use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::*;

/// Pieces of the socket live as long as one of their messages waits, so they must be full of messages.
#[tokio::test]
async fn messages_that_come_one_by_one_share_a_piece() {
    const CONNACK: [u8; 5] = [0x20, 3, 0, 0, 0];
    // Several pieces of READ_BYTES, not the first one alone.
    const MESSAGES: usize = 2_500;
    // PUBLISH at QoS 0: 404 bytes follow, the topic "t", no properties, 400 bytes of payload.
    let mut message = vec![0x30, 0x94, 0x03, 0, 1, b't', 0];
    message.resize(message.len() + 400, b'x');
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = MqttSettings::<Secret> {
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
        ..MqttSettings::default()
    };
    let settings = ConsumerSettings::default();
    let accepted = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&CONNACK).await.unwrap();
        stream
    };
    let (connection, mut stream) = tokio::join!(Connection::open(&broker, &settings), accepted);
    let mut connection = connection.unwrap();
    let mut held = Vec::new();
    while held.len() < MESSAGES {
        stream.write_all(&message).await.unwrap();
        let wanted = held.len() + 1;
        while held.len() < wanted {
            match connection.parse().unwrap() {
                Some(Incoming::Publish(publish)) => held.push(publish.payload),
                Some(_) => {}
                None => {
                    timeout(Duration::from_secs(60), connection.exchange(true)).await.unwrap().unwrap();
                }
            }
        }
    }
    let apart =
        |pair: &[bytes::Bytes]| pair[1].as_ptr() as usize != pair[0].as_ptr() as usize + message.len();
    let pieces = 1 + held.windows(2).filter(|pair| apart(pair)).count();
    assert!(pieces <= 6, "{pieces} pieces hold {MESSAGES} messages of {} bytes", message.len());
}
