/* Empty: BCC's headers include it by name, nothing of it is used. */
